"""Unit tests: no QEMU, no root, no network beyond loopback."""
