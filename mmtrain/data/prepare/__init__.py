"""Making datasets: image folders → tar shards, and the two real data sets of the demo."""
