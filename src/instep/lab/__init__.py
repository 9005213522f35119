"""The exact 2-D laboratory: a mixture whose teacher is known in closed form, small networks, free particles, and recipes side by side. It may import every
room below the command line except human evaluation and the bundled worlds.
"""
