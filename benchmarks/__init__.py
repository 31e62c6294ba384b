"""Speed and memory, side by side with hand-written torch and with other libraries: ``make bench``."""
