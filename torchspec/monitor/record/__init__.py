"""Written by the controller while a run goes on; the rest of the package reads what lies in the run's folder."""
