"""The handwritten digits: their data, and the studies made with them.

They show on real images, in minutes, that the whole program works.  Nothing else imports them, so
they can be changed or left out.
"""
