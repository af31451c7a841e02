"""Indices of rows that every kernel of chosen rows must take, of 90 rows; those outside are none."""

INDICES = {
    "ascending": list(range(0, 90, 4)),
    "descending": list(range(89, -1, -1)),
    "duplicates": [7] * 9 + [88, 7, 0] * 5,
    "outside": [3, -1, 90, 2**40, -(2**40), 89, 3],
    "nothing": [-1] * 6,
    "empty": [],
}
