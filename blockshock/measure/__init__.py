"""Device clock, regions, error figures, cost model, measured ceilings, environment."""
