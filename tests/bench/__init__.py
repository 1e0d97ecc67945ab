"""Speed and memory, measured on a throwaway installation and never asserted: ``make bench``."""
