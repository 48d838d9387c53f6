//! Splits Rust source into code and comments, line by line. Knows strings, raw strings, characters
//! and nested block comments, so that a `//` inside a string literal is not taken for a comment.

/// One line of a Rust file.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Line<'a> {
    /// The code, without comments and without the content of string literals.
    pub code: String,
    /// The `//` comment of this line, from its first slash to the end of the line.
    pub comment: Option<&'a str>,
}

impl Line<'_> {
    /// Whether the line consists of a `//`, `///` or `//!` comment.
    pub(super) fn is_comment(&self) -> bool {
        self.comment.is_some() && self.code.trim().is_empty()
    }

    /// Whether the line consists of a plain comment: `//`, not `///` or `//!`.
    pub(super) fn is_plain_comment(&self) -> bool {
        self.is_comment()
            && self.comment.is_some_and(|text| !text.starts_with("///") && !text.starts_with("//!"))
    }
}

/// What the scanner is inside of at the end of a line.
#[derive(Clone, Copy)]
enum State {
    Code,
    Text,
    /// A raw string that ends with a quote and this many `#`.
    Raw(usize),
    /// A block comment of this depth.
    Block(usize),
}

/// Splits `text` into its lines.
pub(super) fn lines(text: &str) -> Vec<Line<'_>> {
    let mut state = State::Code;
    text.lines().map(|line| split(line, &mut state)).collect()
}

fn split<'a>(line: &'a str, state: &mut State) -> Line<'a> {
    let mut result = Line::default();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        match *state {
            State::Code => {
                if rest.starts_with("//") {
                    result.comment = Some(rest);
                    return result;
                }
                if rest.starts_with("/*") {
                    *state = State::Block(1);
                    length = 2;
                } else if let Some((prefix, hashes)) = raw_string(rest, &result.code) {
                    *state = State::Raw(hashes);
                    length = prefix;
                } else if first == '"' {
                    *state = State::Text;
                } else if first == '\'' {
                    length = character(rest);
                    if length == 1 {
                        result.code.push(first);
                    }
                } else {
                    result.code.push(first);
                }
            }
            State::Text if first == '\\' => length += rest[1..].chars().next().map_or(0, char::len_utf8),
            State::Text => {
                if first == '"' {
                    *state = State::Code;
                }
            }
            State::Raw(hashes) => {
                if first == '"' && rest[1..].bytes().take_while(|&byte| byte == b'#').count() >= hashes {
                    *state = State::Code;
                    length += hashes;
                }
            }
            State::Block(depth) => {
                if rest.starts_with("*/") {
                    *state = if depth == 1 { State::Code } else { State::Block(depth - 1) };
                    length = 2;
                } else if rest.starts_with("/*") {
                    *state = State::Block(depth + 1);
                    length = 2;
                }
            }
        }
        rest = &rest[length..];
    }
    result
}

/// The length of `r"`, `br##"` and the like at the beginning of `rest`, and the number of hashes.
fn raw_string(rest: &str, before: &str) -> Option<(usize, usize)> {
    if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let prefix = ["r", "br", "cr"].into_iter().find(|prefix| {
        rest.strip_prefix(prefix).is_some_and(|after| after.starts_with('#') || after.starts_with('"'))
    })?;
    let hashes = rest[prefix.len()..].bytes().take_while(|&byte| byte == b'#').count();
    let length = prefix.len() + hashes;
    rest[length..].starts_with('"').then_some((length + 1, hashes))
}

/// The length of the character literal at the beginning of `rest`, or 1 for a lifetime.
fn character(rest: &str) -> usize {
    let inner = &rest[1..];
    let literal = if let Some(escaped) = inner.strip_prefix('\\') {
        // the escaped character may itself be a quote
        let after = escaped.chars().next().map_or(0, char::len_utf8);
        escaped[after..].find('\'').map(|end| 1 + after + end)
    } else {
        inner.chars().next().map(char::len_utf8).filter(|&length| inner[length..].starts_with('\''))
    };
    literal.map_or(1, |length| length + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_separated_from_code_and_strings() {
        let text = "let a = \"// text\"; // why\n/// doc\n    // plain\nlet b = '\"'; let c: &'a str = r#\"\n// raw \"\n\"#;\n";
        let lines = lines(text);
        assert_eq!(lines[0].comment, Some("// why"));
        assert!(!lines[0].is_comment() && !lines[0].code.contains("text"));
        assert!(lines[1].is_comment() && !lines[1].is_plain_comment());
        assert!(lines[2].is_plain_comment());
        assert!(lines[3].comment.is_none() && lines[3].code.contains("'a str"));
        assert!(lines[4].comment.is_none(), "{:?}", lines[4]);
        assert_eq!(lines[5].code, ";");
    }

    #[test]
    fn block_comments_are_skipped_and_escapes_are_understood() {
        let lines = lines("a /* b // c */ d\n\"x\\\"y // z\" e '\\'' // f\n");
        assert_eq!(lines[0], Line { code: "a  d".to_owned(), comment: None });
        assert_eq!(lines[1].code.trim(), "e");
        assert_eq!(lines[1].comment, Some("// f"));
    }
}
