"""Storage: the layout of a store, its durable objects, its tables."""
