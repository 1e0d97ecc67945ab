"""What a devbox's disk was made of."""

from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('accounts', '0001_initial'),
        ('devboxes', '0007_idle'),
        ('hosts', '0001_initial'),
    ]

    operations = [
        migrations.AddField(
            model_name='devbox',
            name='snapshot_id',
            field=models.TextField(blank=True, help_text='What its disk was made of, if not of the image.', null=True),
        ),
        migrations.AddField(
            model_name='devbox',
            name='source_bytes',
            field=models.BigIntegerField(db_default=0, default=0, help_text='What its disk was made with beyond the image: counted as used.'),
        ),
        migrations.AddIndex(
            model_name='devbox',
            index=models.Index(condition=models.Q(('snapshot_id__isnull', False)), fields=['snapshot_id'], name='devboxes_devbox_origin'),
        ),
    ]
