//! The setting `uplinks`: patterns of device names, on top of what is found automatically.

use std::str::FromStr;

/// The element that stands for the devices found by their addresses and routes.
const AUTO: &str = "auto";
/// Begins a pattern of devices that are no uplinks.
const EXCLUDE: char = '!';
/// Longest name of a network device: `IFNAMSIZ` less its NUL.
const NAME_MAX: usize = 15;

/// Which devices are uplinks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePatterns {
    /// Take devices by their addresses and routes.
    auto: bool,
    include: Vec<String>,
    exclude: Vec<String>,
}

/// A pattern is no device name, with or without `*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be auto, or names of network devices with * and ! (a list, or separated by commas)")]
pub struct InvalidPattern;

/// What the patterns say about a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Match<'a> {
    /// The pattern excludes it.
    Excluded(&'a str),
    /// Its name is listed.
    Named,
    /// The pattern, which has a `*`, includes it.
    Included(&'a str),
    /// Its addresses and routes decide.
    Auto,
    /// No pattern includes it, and `auto` is not listed.
    NotListed,
}

impl Default for DevicePatterns {
    fn default() -> Self {
        Self { auto: true, include: Vec::new(), exclude: Vec::new() }
    }
}

impl DevicePatterns {
    /// Names without `*` that are listed.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.include.iter().map(String::as_str).filter(|name| !name.contains('*'))
    }

    pub(super) fn matches(&self, name: &str) -> Match<'_> {
        let find = |patterns: &'_ [String]| patterns.iter().position(|pattern| glob(pattern, name));
        if let Some(index) = find(&self.exclude) {
            return Match::Excluded(&self.exclude[index]);
        }
        if self.names().any(|named| named == name) {
            return Match::Named;
        }
        match find(&self.include) {
            Some(index) => Match::Included(&self.include[index]),
            None if self.auto => Match::Auto,
            None => Match::NotListed,
        }
    }
}

impl FromStr for DevicePatterns {
    type Err = InvalidPattern;

    /// Parses elements that are separated by commas.
    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let mut patterns = Self { auto: false, include: Vec::new(), exclude: Vec::new() };
        for element in text.split(',').map(str::trim) {
            match element.strip_prefix(EXCLUDE) {
                _ if element == AUTO => patterns.auto = true,
                Some(excluded) => patterns.exclude.push(pattern(excluded)?),
                None => patterns.include.push(pattern(element)?),
            }
        }
        // with exclusions alone, they are from what is found automatically
        patterns.auto |= patterns.include.is_empty();
        Ok(patterns)
    }
}

fn pattern(text: &str) -> Result<String, InvalidPattern> {
    let refused = |c: char| c == '/' || c == ':' || c == EXCLUDE || c.is_whitespace() || c.is_control();
    let invalid =
        text.is_empty() || text.len() > NAME_MAX || text.contains(refused) || matches!(text, "." | "..");
    if invalid { Err(InvalidPattern) } else { Ok(text.to_owned()) }
}

/// Whether `name` matches `pattern`, in which `*` stands for any characters.
fn glob(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((begin, rest)) => name.strip_prefix(begin).is_some_and(|name| {
            name.char_indices().map(|(at, _)| at).chain([name.len()]).any(|at| glob(rest, &name[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(text: &str) -> DevicePatterns {
        text.parse().unwrap()
    }

    #[test]
    fn asterisk_matches_any_characters() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth*", "eth", true),
            ("eth*", "eth12", true),
            ("eth*", "veth1", false),
            ("*", "wg0", true),
            ("en*s0", "enp3s0", true),
            ("en*s0", "enp3s0f1", false),
            ("e*p*s0", "enp3s0", true),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn list_of_names_takes_these_devices_only() {
        let patterns = patterns("eth0, bond*");
        assert_eq!(patterns.matches("eth0"), Match::Named);
        assert_eq!(patterns.matches("bond1"), Match::Included("bond*"));
        assert_eq!(patterns.matches("eth1"), Match::NotListed);
        assert_eq!(patterns.names().collect::<Vec<_>>(), ["eth0"]);
    }

    #[test]
    fn exclusions_alone_are_from_the_devices_found_automatically() {
        let patterns = patterns("!docker0,!virbr*");
        assert_eq!(patterns.matches("docker0"), Match::Excluded("docker0"));
        assert_eq!(patterns.matches("virbr3"), Match::Excluded("virbr*"));
        assert_eq!(patterns.matches("eth0"), Match::Auto);
    }

    #[test]
    fn exclusion_wins_over_inclusion() {
        let patterns = patterns("auto,eth*,!eth1");
        assert_eq!(patterns.matches("eth1"), Match::Excluded("eth1"));
        assert_eq!(patterns.matches("eth0"), Match::Included("eth*"));
        assert_eq!(patterns.matches("wlan0"), Match::Auto);
        assert_eq!(DevicePatterns::default(), "auto".parse().unwrap());
    }

    #[test]
    fn what_is_no_device_name_is_refused() {
        for text in ["", "eth0,", "a-name-that-is-too-long", "eth0:1", "!", "!!eth0", "a b", ".."] {
            assert_eq!(text.parse::<DevicePatterns>(), Err(InvalidPattern), "{text:?}");
        }
    }
}
