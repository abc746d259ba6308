"""How fast colotx is. C{python -m benchmarks} measures all of it; each module measures one thing."""
