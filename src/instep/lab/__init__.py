"""The exact laboratory: recipes side by side on Gaussian mixtures whose teacher is known in closed form."""
