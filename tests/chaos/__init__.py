"""Everything is killed, frozen and cut at random while much goes on: ``python -m tests.chaos``, ``make chaos``."""
