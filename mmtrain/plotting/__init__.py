"""Every picture: curves, forecasts, tables, splits and selections. Takes arrays; knows no model."""
