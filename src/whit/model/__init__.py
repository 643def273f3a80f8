"""What a model is made of, without its weights.

`skeleton` makes the class on the meta device, `targets` finds which parameters can be quantized, `names` and `source`
where each comes from in a checkpoint, `graph` which linears share an input and where a scale of it folds.
"""
