import cola  # before torch: cola.py sets how long torch's threads spin, and silences a warning
