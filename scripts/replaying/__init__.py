"""Server processes play real conversations into one store while some are killed. Then all is compared."""
