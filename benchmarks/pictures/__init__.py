"""Pictures of the documentation as SVG text: no script in them, readable on light and dark pages."""
