"""The page on which people compare samples, its store and its results. It may import every room below the command line except the laboratory and the
bundled worlds.
"""
