"""Acceptance tests: real QEMU, real Linux guest, real namespaces. Run with C{python -m twisted.trial tests}."""
