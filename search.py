"""`python search.py ...` in a checkout is `nas-search ...`."""

from nas.cli import search

if __name__ == "__main__":
    search()
