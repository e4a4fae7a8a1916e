"""Public forecasting tables: where they are, fetching them so that a whole file or none is there, and checking them."""
