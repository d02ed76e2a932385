"""memplan: training models that do not fit."""
