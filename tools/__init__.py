"""Programs on top, one file each: change and add as you like.

Each is run by path from any folder (or with -m), checks what it is asked before it works, and ends
by common.py in one way (sheet.py is a part of predict.py).  Nothing below imports a tool.
"""
