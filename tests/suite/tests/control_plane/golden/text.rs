//! Rows of text in aligned columns.

use std::fmt::Write as _;

/// Rows under a title and column names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TextTable {
    title: &'static str,
    columns: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

impl TextTable {
    pub(super) const fn new(title: &'static str, columns: &'static [&'static str]) -> Self {
        Self { title, columns, rows: Vec::new() }
    }

    pub(super) const fn title(&self) -> &'static str {
        self.title
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Adds a row. An empty cell is shown as `-`.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        assert_eq!(N, self.columns.len(), "cells of {}", self.title);
        self.rows.push(cells.map(|cell| if cell.is_empty() { "-".to_owned() } else { cell }).into());
    }

    /// The title, then the rows indented by two; or the title and that there are none.
    pub(super) fn to_text(&self) -> String {
        if self.rows.is_empty() {
            return format!("{}: none\n", self.title);
        }
        let mut text = format!("{}\n", self.title);
        let header: Vec<String> = self.columns.iter().map(ToString::to_string).collect();
        let lines = || [&header].into_iter().chain(&self.rows);
        let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        for line in lines() {
            let mut padded = String::new();
            for (cell, width) in line.iter().zip(&widths) {
                // writing to a string does not fail
                let _ok = write!(padded, "  {cell:<width$}");
            }
            text.push_str(padded.trim_end());
            text.push('\n');
        }
        text
    }
}
