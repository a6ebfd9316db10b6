"""Okabe and Ito's colours, for colour-blind readers, and viridis, its bright end darkened for white paper."""

BLUE, ORANGE, GREEN, RED = "#0072b2", "#d98c00", "#009e73", "#d55e00"
PURPLE, SKY, GREY, INK = "#b75c92", "#3f9fd8", "#7a828c", "#1c2128"
SCALE = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#8fbf27", "#c3b70e")
