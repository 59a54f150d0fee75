"""Did it learn? What the rows of a run show, in order of weight, and what to do about it."""
