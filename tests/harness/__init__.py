"""What the proofs are made of: each module serves a short form in the tests and, most of them,
a long form in scripts/.
"""
