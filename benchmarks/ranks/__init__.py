"""One model on several ranks: experts split over processes, each with a link and a cache."""
