"""What a run is on disk: its folder, configuration, journal and status. Imports no torch."""
