"""What leaves the lab: cut-out classifiers, early exits, exported files, the Hub."""
