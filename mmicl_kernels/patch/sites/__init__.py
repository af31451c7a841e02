"""How a method gets into a model at each kind of site."""
