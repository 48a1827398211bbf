"""Lightning callbacks: thin adapters, one class per file. Each calls a plain function of `pl_normkit` at the right hook."""
