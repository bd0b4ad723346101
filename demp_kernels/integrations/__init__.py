"""DemP inside other libraries' training loops; each module needs its library: `lightning`, `transformers`."""
