#!/usr/bin/env python
"""Django's command line for Berth."""

import os
import sys

import config  # noqa: F401  (first: settles what the name ``pty`` means in this process)


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
