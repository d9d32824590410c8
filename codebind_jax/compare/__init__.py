"""Methods side by side on the same towers, data and steps: training, evaluation, cost, claims, figures, page."""
