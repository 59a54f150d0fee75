"""How each plot of a run is drawn. matplotlib's object interface only: no pyplot."""
