"""Speculative decoding: cheap guesses at the next tokens, which the target checks all at once in its own step.

proposer.py     what a proposer is
lookup.py       n-gram lookup in the sequence itself, suffix lookup in a tenant's earlier requests
medusa.py       extra heads on the target's last hidden state
draft_model.py  a small model with a small KV pool of its own
cost.py         what a step costs by its number of rows, measured
acceptance.py   how often guesses turn out right, measured
lengths.py      from both: how many guesses each sequence brings into the next step
speculation.py  the engine's side of it
"""
