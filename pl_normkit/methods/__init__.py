"""One room per method: its rules, its probe, its fix and its modules. Rooms never import each other."""
