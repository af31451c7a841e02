"""Error budgets and inputs for tests of the ops. Imported by no other part of the package."""
