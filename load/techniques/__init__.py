"""The techniques table: each technique off and on, on the same traffic, beside what is published of it.

catalogue.py    which rows there are, what is published of each, and who measures it
measure.py      the run: row after row, kept and taken up again
affinity.py, right_size.py   the rows that need a fleet
figures.py      from a row's turns to ratios with their spread, and to the words of a table
show.py         terminal, README and HTML
__main__.py     the command
"""
