"""The laboratory: namespaces, clients, links with delay, and the demonstration that kills hosts."""
