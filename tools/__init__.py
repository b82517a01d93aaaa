"""Programs on top, one file each: change and add as you like.

Each is run by path from any folder (or with -m), checks what it is asked before it works, and ends
by common.py in one way.  Nothing below imports a tool.
"""
