"""Tests mirror the tree. `check` is what checks annotations while they run."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as to every type checker
