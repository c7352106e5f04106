//! PROPFIND: the question, and its answer in XML (RFC 4918, sections 9.1 and 14).

use quick_xml::{
    NsReader,
    events::{BytesStart, Event},
    name::{Namespace, ResolveResult},
};

/// What is asked of each file and directory.
pub(crate) const QUESTION: &str = "<?xml version=\"1.0\" encoding=\"utf-8\"?>\n\
    <D:propfind xmlns:D=\"DAV:\"><D:prop><D:resourcetype/><D:getcontentlength/><D:getlastmodified/><D:getetag/></D:prop>\
    </D:propfind>";

const DAV: Namespace<'static> = Namespace(b"DAV:");

/// What the answer says about one file or directory. Values are taken as text: one that is wrong must not fail the
/// others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As sent: a URL or its path, percent-encoded.
    pub(crate) href: String,
    /// Whether it is a directory.
    pub(crate) collection: bool,
    pub(crate) length: Option<String>,
    pub(crate) modified: Option<String>,
    pub(crate) etag: Option<String>,
}

/// Elements that have a meaning here, in the namespace of DAV under whatever prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    Multistatus,
    Response,
    Href,
    Propstat,
    Prop,
    ResourceType,
    Collection,
    Length,
    Modified,
    Etag,
    Other,
}

impl Element {
    fn of(namespace: &ResolveResult<'_>, start: &BytesStart<'_>) -> Self {
        if *namespace != ResolveResult::Bound(DAV) {
            return Self::Other;
        }
        match start.local_name().as_ref() {
            b"multistatus" => Self::Multistatus,
            b"response" => Self::Response,
            b"href" => Self::Href,
            b"propstat" => Self::Propstat,
            b"prop" => Self::Prop,
            b"resourcetype" => Self::ResourceType,
            b"collection" => Self::Collection,
            b"getcontentlength" => Self::Length,
            b"getlastmodified" => Self::Modified,
            b"getetag" => Self::Etag,
            _ => Self::Other,
        }
    }
}

/// The entries of an answer, in its order. A property that a server does not have comes without a value, or not at
/// all.
pub(crate) fn parse(xml: &[u8]) -> Result<Vec<Entry>, String> {
    let mut reader = NsReader::from_reader(xml);
    reader.config_mut().expand_empty_elements = true;
    let (mut entries, mut entry) = (Vec::new(), Entry::default());
    let (mut path, mut text, mut seen) = (Vec::new(), String::new(), false);
    loop {
        let (namespace, event) = reader.read_resolved_event().map_err(|error| error.to_string())?;
        match event {
            Event::Start(start) => {
                path.push(Element::of(&namespace, &start));
                text.clear();
                seen = true;
                if path[0] != Element::Multistatus {
                    return Err("it is no multistatus of DAV".to_owned());
                }
            }
            Event::Text(piece) => text.push_str(&piece.decode().map_err(|error| error.to_string())?),
            Event::CData(piece) => text.push_str(&piece.decode().map_err(|error| error.to_string())?),
            Event::GeneralRef(reference) => {
                let character = reference.resolve_char_ref().map_err(|error| error.to_string())?;
                let name = reference.decode().map_err(|error| error.to_string())?;
                match (character, quick_xml::escape::resolve_predefined_entity(&name)) {
                    (Some(character), _) => text.push(character),
                    (None, Some(known)) => text.push_str(known),
                    (None, None) => return Err(format!("unknown entity '{name}'")),
                }
            }
            Event::End(_) => {
                entry.close(&path, text.trim());
                text.clear();
                if path.pop() == Some(Element::Response) && path.len() == 1 {
                    entries.push(std::mem::take(&mut entry));
                }
            }
            Event::Eof if path.is_empty() => break,
            Event::Eof => return Err("it ends early".to_owned()),
            Event::Empty(_) | Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    if seen { Ok(entries) } else { Err("it is no XML".to_owned()) }
}

impl Entry {
    /// Takes the value of the element at the end of `path`.
    fn close(&mut self, path: &[Element], text: &str) {
        use Element::{Collection, Etag, Href, Length, Modified, Multistatus, Prop, Propstat, ResourceType, Response};
        let value = || Some(text.to_owned()).filter(|text| !text.is_empty());
        match path {
            // One that was moved or is many has further ones; the first names it.
            [Multistatus, Response, Href] if self.href.is_empty() => text.clone_into(&mut self.href),
            [Multistatus, Response, Propstat, Prop, property @ ..] => match property {
                [ResourceType, Collection] => self.collection = true,
                [Length] => self.length = self.length.take().or_else(value),
                [Modified] => self.modified = self.modified.take().or_else(value),
                [Etag] => self.etag = self.etag.take().or_else(value),
                _ => {}
            },
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn prefixes_and_foreign_properties_do_not_matter() {
        let apache = r#"<?xml version="1.0" encoding="utf-8"?>
<D:multistatus xmlns:D="DAV:" xmlns:ns0="DAV:">
<D:response xmlns:lp1="DAV:" xmlns:lp2="http://apache.org/dav/props/">
<D:href>/data/a&amp;b%20c.txt</D:href>
<D:propstat><D:prop><lp1:resourcetype/><lp1:getcontentlength>5</lp1:getcontentlength>
<lp1:getlastmodified>Wed, 21 Oct 2015 07:28:00 GMT</lp1:getlastmodified>
<lp2:getetag>"not this"</lp2:getetag><lp1:getetag>&#34;5-&quot;</lp1:getetag></D:prop>
<D:status>HTTP/1.1 200 OK</D:status></D:propstat>
<D:propstat><D:prop><lp1:getcontentlength/></D:prop><D:status>HTTP/1.1 404 Not Found</D:status></D:propstat>
</D:response></D:multistatus>"#;
        let file = Entry {
            href: "/data/a&b%20c.txt".to_owned(),
            collection: false,
            length: Some("5".to_owned()),
            modified: Some("Wed, 21 Oct 2015 07:28:00 GMT".to_owned()),
            etag: Some("\"5-\"".to_owned()),
        };
        assert_eq!(parse(apache.as_bytes()), Ok(vec![file]));
        let nginx = r#"<multistatus xmlns="DAV:"><response><href><![CDATA[/data/]]></href><propstat><prop>
<resourcetype><collection/></resourcetype></prop></propstat></response><response><href>/data/x</href>
<status>HTTP/1.1 403 Forbidden</status></response></multistatus>"#;
        let directory = Entry { href: "/data/".to_owned(), collection: true, ..Entry::default() };
        let bare = Entry { href: "/data/x".to_owned(), ..Entry::default() };
        assert_eq!(parse(nginx.as_bytes()), Ok(vec![directory, bare]));
    }

    #[test]
    fn other_documents_are_refused() {
        for xml in [
            "",
            "nonsense",
            "<html><body>index</body></html>",
            "<multistatus><response/></multistatus>",
            "<D:multistatus xmlns:D=\"DAV:\"><D:response>",
            "<D:multistatus xmlns:D=\"DAV:\">&x;</D:multistatus>",
            "<D:multistatus xmlns:D=\"DAV:\"></D:other>",
        ] {
            assert!(parse(xml.as_bytes()).is_err(), "{xml}");
        }
        assert_eq!(parse(b"<D:multistatus xmlns:D=\"DAV:\"/>"), Ok(Vec::new()));
    }
}
