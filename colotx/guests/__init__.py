"""Guests: what colotx protects. C{memory} is embedded, C{qemu} is a real virtual machine."""
