//! The difference of two texts by lines, for a person to read.

use std::fmt::Write as _;

/// Equal lines that are shown before and after a difference.
const CONTEXT: usize = 2;

/// A line of the difference: of the first text only (`-`), of the second only (`+`), or of both.
type Line<'a> = (char, &'a str);

/// The lines that differ: `-` before those of `before`, `+` before those of `after`.
pub(super) fn diff(before: &str, after: &str) -> String {
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let lines = lines(&before, &after);
    let near = |index: usize| {
        let range = index.saturating_sub(CONTEXT)..(index + CONTEXT + 1).min(lines.len());
        lines[range].iter().any(|(sign, _)| *sign != ' ')
    };
    let mut text = String::new();
    let mut skipped = false;
    for (index, (sign, line)) in lines.iter().enumerate() {
        if near(index) {
            if skipped {
                text.push_str("  ...\n");
            }
            // writing to a string does not fail
            let _ok = writeln!(text, "{}", format!("{sign} {line}").trim_end());
        }
        skipped = !near(index);
    }
    text
}

/// By the longest common subsequence.
fn lines<'a>(before: &[&'a str], after: &[&'a str]) -> Vec<Line<'a>> {
    // common[i][j]: length of the longest common subsequence of before[i..] and after[j..]
    let mut common = vec![vec![0_usize; after.len() + 1]; before.len() + 1];
    for i in (0..before.len()).rev() {
        for j in (0..after.len()).rev() {
            common[i][j] = if before[i] == after[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < before.len() || j < after.len() {
        if i < before.len() && j < after.len() && before[i] == after[j] {
            lines.push((' ', before[i]));
            (i, j) = (i + 1, j + 1);
        } else if i < before.len() && (j == after.len() || common[i + 1][j] >= common[i][j + 1]) {
            lines.push(('-', before[i]));
            i += 1;
        } else {
            lines.push(('+', after[j]));
            j += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_added_and_removed_lines_are_shown_with_context() {
        let before = "a\nb\nc\nd\ne\nf\ng\nh\n";
        let after = "a\nb\nc\nD\ne\nf\ng\nh\ni\n";
        assert_eq!(diff(before, after), "  ...\n  b\n  c\n- d\n+ D\n  e\n  f\n  g\n  h\n+ i\n");
        assert_eq!(diff("a\nb\nc\nd\ne\n", "a\nb\nc\nd\n"), "  ...\n  c\n  d\n- e\n");
    }

    #[test]
    fn equal_texts_have_no_difference() {
        assert_eq!(diff("a\nb\n", "a\nb\n"), "");
    }
}
