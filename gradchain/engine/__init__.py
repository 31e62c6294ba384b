"""From formulas to a step: traces of pure functions, programs in place, and the states and parameters of a step."""
