"""Right-size: which model should answer a request, by predicted quality against price.

    table.py      the score table and the price list a predictor is trained from
    features.py   prompt text -> cues and hashed n-grams
    trees.py      extremely randomised trees, many outputs at once
    predictor.py  text -> predicted quality of every model; the artefact on disk
    train.py      table -> predictor, with settings chosen on a validation part
    choose.py     predicted qualities and expected costs -> one model, with the reasoning
    defaults.py   what stands in for a predictor before one is trained
    frontier.py   quality against cost over the sweep of `cost_weight`
    cascade.py    try the small model, look at its confidence, escalate
    guarantee.py  watch agreement with the strong model and move towards safety

Numpy is all that a decision needs; matplotlib is imported when a plot is drawn.
"""
