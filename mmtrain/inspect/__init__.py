"""Looking inside models: tables of stages, heat maps of the averaging weights, maps of what was selected."""
