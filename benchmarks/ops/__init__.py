"""One file per benchmark of an op, which has its SPEC: shapes, inputs, peers, least work, right values."""
